"""lingshu-cell: masked discrete diffusion over whole single-cell transcriptomes."""

__version__ = "0.1.0"
