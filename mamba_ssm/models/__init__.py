"""Language models: ``mixer_seq_simple.MambaLMHeadModel``, ``config_mamba.MambaConfig``."""
