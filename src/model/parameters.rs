//! All parameters of a model in one flat buffer, and their gradients in another.
//!
//! One buffer makes the all-reduce one call, the optimizer a handful of kernels, and the global norm one
//! reduction, whatever the number of tensors.

use std::ops::Range;

use tch::{Device, Kind, Tensor};

/// Where a parameter lies in the flat buffers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    /// Name, as in checkpoints.
    pub name: String,
    /// Shape, row-major.
    pub shape: Vec<i64>,
    range: Range<i64>,
}

/// Named parameters, in the order in which they were declared.
pub struct Parameters {
    views: Vec<View>,
    values: Tensor,
    /// Gradients, and behind them the loss and the number of targets: see [`Parameters::reduced`].
    gradients: Tensor,
    /// One leaf a view, sharing memory with `values`.
    leaves: Vec<Tensor>,
}

/// Numbers that travel with the gradients: the summed loss and the number of targets.
const TAIL: i64 = 2;

impl Parameters {
    /// Lays the given tensors out one after the other.
    pub fn new(initial: Vec<(String, Tensor)>, device: Device) -> Self {
        let mut views = Vec::with_capacity(initial.len());
        let mut end = 0;
        for (name, tensor) in &initial {
            let n = tensor.numel() as i64;
            views.push(View { name: name.clone(), shape: tensor.size(), range: end..end + n });
            end += n;
        }
        let flat: Vec<Tensor> = initial.iter().map(|(_, tensor)| tensor.reshape([-1])).collect();
        let values = Tensor::cat(&flat, 0).to_kind(Kind::Float).to_device(device);
        let gradients = Tensor::zeros([end + TAIL], (Kind::Float, device));
        let leaves = views.iter().map(|view| part(&values, view).detach().set_requires_grad(true)).collect();
        Self { views, values, gradients, leaves }
    }

    /// The parameters, in order.
    pub fn views(&self) -> &[View] {
        &self.views
    }

    /// Number of values.
    pub fn len(&self) -> i64 {
        self.values.size()[0]
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All values, flat.
    pub fn values(&self) -> Tensor {
        self.values.shallow_clone()
    }

    /// All gradients, flat.
    pub fn gradients(&self) -> Tensor {
        self.gradients.narrow(0, 0, self.len())
    }

    /// What the ranks sum after a backward pass: `[gradients, loss, n_targets]`.
    pub fn reduced(&self) -> Tensor {
        self.gradients.shallow_clone()
    }

    /// The summed loss and the number of targets, `[2]`.
    pub fn tail(&self) -> Tensor {
        self.gradients.narrow(0, self.len(), TAIL)
    }

    /// The parameter number `index` as a leaf of the autograd graph.
    pub fn leaf(&self, index: usize) -> &Tensor {
        &self.leaves[index]
    }

    /// The gradient of parameter number `index`, shaped like it.
    pub fn gradient(&self, index: usize) -> Tensor {
        part(&self.gradients, &self.views[index])
    }

    /// Forgets the gradients of the last step.
    pub fn zero_gradients(&mut self) {
        let _ = self.gradients.zero_();
    }

    /// Splits a flat tensor as long as [`Parameters::values`] into named tensors.
    pub fn named(&self, flat: &Tensor) -> Vec<(String, Tensor)> {
        self.views.iter().map(|view| (view.name.clone(), part(flat, view))).collect()
    }

    /// Copies named tensors into a flat tensor as long as [`Parameters::values`].
    ///
    /// # Errors
    /// Names the first parameter that is missing, unknown or of another shape.
    pub fn assign(&self, flat: &Tensor, named: &[(String, Tensor)]) -> Result<(), String> {
        if let Some((name, _)) =
            named.iter().find(|(name, _)| self.views.iter().all(|view| view.name != *name))
        {
            return Err(format!("unknown parameter `{name}`"));
        }
        for view in &self.views {
            let (_, tensor) = named
                .iter()
                .find(|(name, _)| *name == view.name)
                .ok_or_else(|| format!("parameter `{}` is missing", view.name))?;
            if tensor.size() != view.shape {
                return Err(format!(
                    "parameter `{}` has the shape {:?}, the model's is {:?}",
                    view.name,
                    tensor.size(),
                    view.shape
                ));
            }
            tch::no_grad(|| part(flat, view).copy_(tensor));
        }
        Ok(())
    }
}

fn part(flat: &Tensor, view: &View) -> Tensor {
    flat.narrow(0, view.range.start, view.range.end - view.range.start).view(view.shape.as_slice())
}
