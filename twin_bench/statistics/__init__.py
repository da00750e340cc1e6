"""What scores say of methods: draws of rows, intervals, comparisons, power. Pure functions of arrays."""
