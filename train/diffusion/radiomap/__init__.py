"""The radio map model: data, stages, training and assessment."""
