# SPDX-License-Identifier: Apache-2.0
"""The VAEs: videos and pictures to latents and back.

`hunyuan` is the video VAE, `layers` its network as published. `stages`, `stream` and `schemes` run
that network over chunks of frames within a given memory, `winograd` is its convolution on CPUs,
`tiles` the published pipeline's tiling. `flux` is the VAE of the image checkpoints, and
`accounting` counts bytes for whoever places networks on a device.

Letters of sizes, here and in the comments on shapes:
    B        videos in a batch
    C        channels of an activation; C' after a layer that changes them
    F, H, W  frames, height and width of a video, in pixels
    T, Y, X  the same of its latents, and of any activation between: F = 4 (T - 1) + 1, H = 8 Y and
             W = 8 X
    f        frames of one chunk
    P        positions of a frame, Y * X
    G        groups of a GroupNorm
A tensor is [B, C, T, Y, X] between modules and [B, T, Y, X, C] (channels last) inside a stream.
"""
