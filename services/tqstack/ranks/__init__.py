"""One model over several processes: rank 0 has HTTP and decides, the others follow its orders."""
