"""Methods side by side: the same data, loop and tuning effort for all, one JSON line a result."""
