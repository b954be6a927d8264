"""Random problems on which the certificates are held against an independent interval around the optimum."""
