"""Operations: public functions, the internal op layer and its backends."""
