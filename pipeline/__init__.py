"""WHAT HAPPENS to one study: read, plan, tile, predict, stitch, write, measure, export."""
