"""Which method at which budget, for a user's own pictures, a speed-up and a loss: `vlmprune tune`."""
