"""Planning: plans, schedules and strategies, as pure functions without torch."""
