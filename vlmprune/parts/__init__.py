"""What methods are composed of: pure tensor code that knows no host and no engine, under any transformers."""
