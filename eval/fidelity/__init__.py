"""Agreement with the unpruned model on a user's own pictures, without labels."""
