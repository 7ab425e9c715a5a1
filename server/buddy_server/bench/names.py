"""The names that benchmark flags accept. Imports nothing, because the command line reads it at every start."""

PEERS = ("transformers", "llama.cpp")
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8"}
SHAPE_NAMES = ("16x256", "12x768", "24x896")
