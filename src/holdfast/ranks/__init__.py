"""How the ranks of a job agree, and what runs beside training."""
