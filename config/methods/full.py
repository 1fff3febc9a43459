# Full rank: every parameter trains with AdamW. Best rate: 1e-3 at 10.7M parameters, 2e-3 at 3.3M.
