"""What a person looks at while a run trains: tags, samples, the plane of two losses, a page in the terminal."""
