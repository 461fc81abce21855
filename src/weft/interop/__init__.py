"""Other libraries' formats: bytes to and from (specification, tensors). Never runs a model."""
