# Local AdamW: every rank trains whole weights, averaged every T steps. torchrun only. Best rate: 1e-3 (10.7M), 2e-3 (3.3M).
sync, merge_every = 'merge', 10
