"""Where jobs run: profiles and the local stack."""
