"""The operations, one a file: the public function and its checks, dispatch, closed form, autograd, operator."""
