"""A model whose matrices are cut over several devices, each with a process: tensor parallel."""
