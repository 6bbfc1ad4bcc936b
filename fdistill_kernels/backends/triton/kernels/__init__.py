"""The Triton kernels, a file each, and the steps they share: rows, scale; head_statistics, tiles, tile_products."""
