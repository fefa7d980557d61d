"""The low-rank correction: PSP, the publication's, and the one with the smallest output error."""
