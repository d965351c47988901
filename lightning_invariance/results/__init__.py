"""Results of evaluations: values, intervals, tables, files, comparisons and warnings."""
