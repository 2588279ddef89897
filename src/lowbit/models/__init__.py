"""Model families: tensor names, row orders and the order of layers."""
