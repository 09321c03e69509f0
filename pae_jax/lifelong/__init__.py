"""The lifelong driver: tasks, recipes and the loop that learns one after the other."""
