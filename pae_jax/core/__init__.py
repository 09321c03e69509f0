"""State to state: who owns which weight, and every pure function that changes it."""
