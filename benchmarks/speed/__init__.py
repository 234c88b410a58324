"""The benchmark: what autopeft saves against a loop over peft and Trainer, at equal work and at equal worth."""
