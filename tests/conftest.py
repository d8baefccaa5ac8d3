"""Shared by all tests."""

import os

import torch

# Set before anything imports matplotlib or wandb.
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("WANDB_SILENT", "true")

# Small tensors gain nothing from threads, and lose tenfold where cores are shared.
torch.set_num_threads(1)
