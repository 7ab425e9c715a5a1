"""Several engines behind one HTTP application, on Ray Serve. Only `buddy serve --replicas` and Ray import this."""
