# SPDX-License-Identifier: Apache-2.0
"""The diffusion transformer and what belongs to it. Read `transformer` first, then `attention`.

| module | what it holds |
|---|---|
| `transformer` | the network: embeddings, text blocks, visual blocks, out layer |
| `modulation` | shift, scale and gate of every sub-layer, from the time |
| `attention` | multi-head attention: dense, block-sparse, over a text |
| `nabla` | which blocks of keys a block of queries attends to |
| `layout` | what one size of video needs at every step: token order, rotary tables, blocks |
| `geometry` | the arithmetic behind it: patches, tiles, positions, angles |
| `linear`, `quantized` | linear layers, with adapters and with weights in 8 bits |
| `accounting` | how many bytes sampling takes |

Sizes, in shape comments and as names:

| letter | what it counts |
|---|---|
| B | samples of a batch |
| T, Y, X | tokens along time, height and width: latent frames, patch rows, patch columns |
| S | tokens of a video, T * Y * X |
| L | tokens of a text |
| C | channels of the residual stream, `model_dim` |
| H, D | heads, and channels of one head; C = H * D |
| N | blocks of tokens, at most 64 each, that NABLA chooses among |
| V | modulation vectors of all blocks |
"""
