"""What the benchmarks share: files, statistics, images, classifiers and their training."""
