"""How a network learns: recipe, cases, samples, loss, the loop. Arrays come from files; nothing here reads scans."""
