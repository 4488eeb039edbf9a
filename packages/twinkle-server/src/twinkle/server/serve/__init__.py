"""The server's processes and how they reach each other, on Ray and Ray Serve. The only package that imports ray."""
