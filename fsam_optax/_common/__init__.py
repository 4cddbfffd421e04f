"""What every part needs: checks of arguments, mapped axes, norms."""
