"""Planning, without torch: plan (which worker holds which blocks), schedule (the messages), strategy (a round)."""
