"""What serves the scripts: nobody must open it to use or to extend them."""
