"""The building blocks: ``mamba_simple.Mamba``, ``block.Block``, ``mlp.GatedMLP``, ``mha.MHA``."""
