"""What a recipe needs of a machine, told before anything is downloaded or trained."""
