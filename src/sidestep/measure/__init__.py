"""Memory, time and energy of a step: counted, measured, or planned before anything is allocated."""
