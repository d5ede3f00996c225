"""How well detectors tell attacked inputs from clean ones, by attack."""
