"""What an evaluation has found: values, intervals, tables, files, comparisons and warnings."""
