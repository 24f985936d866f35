"""Connect weight decays to other trainers. Each module imports the library of its trainer; nothing imports it."""
