"""The seesaw benchmark: real models, real tasks, and every way of making one model of their experts."""
