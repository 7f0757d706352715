"""Sharded checkpoints: one file a rank, written by `torch.distributed.checkpoint`, counted only once committed.

A checkpoint is a folder `step-00000100/` with `__<rank>_0.distcp` (tensors), `index.json` (where each lies),
`config.yaml`, and `commit.json`: step, topology and the size and checksum of every file. `commit.json` is written last,
after all bytes are durable, so its presence means that the checkpoint is whole; its checksums mean that it still is.
Every rank says which boxes of each global tensor it has, so torch loads them at any other legal topology.
"""
