"""Storage that outlives the process: the ledger of trials, and result files that grow."""
