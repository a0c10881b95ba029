"""The losses of initial students: plain functions of tensors."""
