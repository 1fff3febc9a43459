# Local AdamW: every rank trains whole weights, averaged every T steps; torchrun only. Best rate: 1e-3.
sync, merge_every = 'merge', 10
