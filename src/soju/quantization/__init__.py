"""What torchao and CTranslate2 lack: a packed four-bit layer, and training on the grid that is shipped."""
