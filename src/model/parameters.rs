//! All parameters of a model in one flat buffer, and their gradients in another.
//!
//! One buffer makes the all-reduce one call, the optimizer a handful of kernels, and the global norm one
//! reduction, whatever the number of tensors. Where tables of items are divided over the ranks, they come first: what
//! follows them is the same on every rank, and it alone is reduced.

use std::ops::Range;
use std::sync::Arc;

use tch::{Device, Kind, Tensor};

use super::Share;
use crate::device::host::return_freed_memory;

/// Initial values of parameters, in the order in which they are declared, by which they are found later.
#[derive(Default)]
pub struct Initial {
    values: Vec<(String, Tensor)>,
    /// How many of them, the first, are shares of tables.
    n_shares: usize,
    /// Where only sizes are asked for, these, and no values.
    sizes: Option<Vec<(String, Vec<i64>)>>,
}

/// Rows of a table that are drawn at a time. A draw is the same in one go and in blocks, if blocks are whole multiples of 16
/// numbers.
const BLOCK_ROWS: i64 = 1 << 16;

impl Initial {
    /// Notes the sizes of parameters, which take no memory.
    pub(super) fn sizes_only() -> Self {
        Self { sizes: Some(Vec::new()), ..Self::default() }
    }

    /// What was noted.
    pub(super) fn into_sizes(self) -> Vec<(String, Vec<i64>)> {
        self.sizes.unwrap_or_default()
    }

    /// Number of parameters so far.
    pub fn len(&self) -> usize {
        self.sizes.as_ref().map_or(self.values.len(), Vec::len)
    }

    /// Whether there are none so far.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The rows of a table `[V, D]` that are here, of a table normally distributed around 0: the same whoever holds which.
    /// Shares come before all other parameters.
    pub fn table(&mut self, name: impl Into<String>, width: i64, std: f64, share: &Share<'_>) -> usize {
        self.add_share(name.into(), &[share.len(), width], share, || {
            let rows = Tensor::empty([share.len(), width], (Kind::Float, Device::Cpu));
            let mut start = 0;
            while start < share.n_items {
                // The last block is not smaller than the others, lest it be drawn in another way.
                let left = share.n_items - start;
                let n = if left < 2 * BLOCK_ROWS { left } else { BLOCK_ROWS };
                let block = Tensor::randn([n, width], (Kind::Float, Device::Cpu)) * std;
                let here = start.max(share.rows.start)..(start + n).min(share.rows.end);
                if !here.is_empty() {
                    let n_here = here.end - here.start;
                    let mut to = rows.narrow(0, here.start - share.rows.start, n_here);
                    to.copy_(&block.narrow(0, here.start - start, n_here));
                }
                start += n;
            }
            rows
        })
    }

    /// A number for each item that is here, all the same.
    pub fn column(&mut self, name: impl Into<String>, value: f64, share: &Share<'_>) -> usize {
        let full = || Tensor::full([share.len()], value, (Kind::Float, Device::Cpu));
        self.add_share(name.into(), &[share.len()], share, full)
    }

    fn add_share(
        &mut self,
        name: String,
        size: &[i64],
        share: &Share<'_>,
        draw: impl FnOnce() -> Tensor,
    ) -> usize {
        let index = self.add(name, size, draw);
        if share.company().is_some() {
            debug_assert_eq!(index, self.n_shares, "shares come first");
            self.n_shares = index + 1;
        }
        index
    }

    /// Normally distributed around 0.
    pub fn normal(&mut self, name: impl Into<String>, size: &[i64], std: f64) -> usize {
        self.add(name.into(), size, || Tensor::randn(size, (Kind::Float, Device::Cpu)) * std)
    }

    /// Uniform in ±1/√fan_in, as PyTorch begins its linear and recurrent layers.
    pub fn uniform(&mut self, name: impl Into<String>, size: &[i64], fan_in: i64) -> usize {
        let bound = (fan_in as f64).powf(-0.5);
        let draw = || Tensor::empty(size, (Kind::Float, Device::Cpu)).uniform_(-bound, bound);
        self.add(name.into(), size, draw)
    }

    /// All the same.
    pub fn constant(&mut self, name: impl Into<String>, size: &[i64], value: f64) -> usize {
        self.add(name.into(), size, || Tensor::full(size, value, (Kind::Float, Device::Cpu)))
    }

    /// A linear layer as PyTorch begins it.
    pub fn linear(&mut self, name: &str, n_in: i64, n_out: i64) -> Linear {
        let weight = self.uniform(format!("{name}.weight"), &[n_out, n_in], n_in);
        Linear { weight, bias: self.uniform(format!("{name}.bias"), &[n_out], n_in) }
    }

    /// A linear layer with normally distributed weights and no bias at first.
    pub fn normal_linear(&mut self, name: &str, n_in: i64, n_out: i64, std: f64) -> Linear {
        let weight = self.normal(format!("{name}.weight"), &[n_out, n_in], std);
        Linear { weight, bias: self.constant(format!("{name}.bias"), &[n_out], 0.0) }
    }

    /// A layer norm that changes no scale at first.
    pub fn layer_norm(&mut self, name: &str, width: i64, epsilon: f64) -> LayerNorm {
        let weight = self.constant(format!("{name}.weight"), &[width], 1.0);
        LayerNorm { weight, bias: self.constant(format!("{name}.bias"), &[width], 0.0), width, epsilon }
    }

    fn add(&mut self, name: String, size: &[i64], draw: impl FnOnce() -> Tensor) -> usize {
        match &mut self.sizes {
            Some(sizes) => sizes.push((name, size.to_vec())),
            None => self.values.push((name, draw())),
        }
        self.len() - 1
    }
}

/// A linear layer's parameters, by index.
#[derive(Clone, Copy, Debug)]
pub struct Linear {
    weight: usize,
    bias: usize,
}

impl Linear {
    /// `x: [.., n_in]` → `[.., n_out]`.
    pub fn apply(self, parameters: &Parameters, x: &Tensor) -> Tensor {
        x.linear(parameters.leaf(self.weight), Some(parameters.leaf(self.bias)))
    }
}

/// The parameters of a layer norm (Ba et al. 2016), by index.
#[derive(Clone, Copy, Debug)]
pub struct LayerNorm {
    weight: usize,
    bias: usize,
    width: i64,
    epsilon: f64,
}

impl LayerNorm {
    /// `x: [.., width]` → the same shape.
    pub fn apply(self, parameters: &Parameters, x: &Tensor) -> Tensor {
        let (weight, bias) = (parameters.leaf(self.weight), parameters.leaf(self.bias));
        x.layer_norm([self.width].as_slice(), Some(weight), Some(bias), self.epsilon, true)
    }
}

/// Where a parameter lies in the flat buffers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    /// Name, as in checkpoints.
    pub name: String,
    /// Shape, row-major.
    pub shape: Vec<i64>,
    range: Range<i64>,
}

/// Parameters begin at multiples of so many numbers, which is a line of the cache and more than products of matrices ask for.
const ALIGNED: i64 = 16;

impl View {
    /// Where in the flat buffers the next parameter may begin.
    pub fn end(&self) -> i64 {
        let Range { end, .. } = self.range;
        end + (ALIGNED - end % ALIGNED) % ALIGNED
    }

    /// Its part of a flat buffer of all parameters, shaped like it.
    pub fn of(&self, flat: &Tensor) -> Tensor {
        flat.narrow(0, self.range.start, self.range.end - self.range.start).view(self.shape.as_slice())
    }
}

/// Named parameters, in the order in which they were declared.
pub struct Parameters {
    views: Arc<[View]>,
    values: Tensor,
    /// Gradients, and behind them what travels with them: see [`Parameters::reduced`].
    gradients: Tensor,
    /// One leaf a view, sharing memory with `values`.
    leaves: Vec<Tensor>,
    /// Numbers at the beginning that no other rank has.
    n_own: i64,
}

/// Copies `from` into `to`, which must be as large, or may have more rows if it `may_grow`.
///
/// # Errors
/// Says what `name` is and should be.
pub fn copy_rows(name: &str, from: &Tensor, to: &Tensor, may_grow: bool) -> Result<(), String> {
    let (size, wanted) = (from.size(), to.size());
    let is_grown = may_grow && size.len() == wanted.len() && size[1..] == wanted[1..] && size[0] < wanted[0];
    if size != wanted && !is_grown {
        return Err(format!("parameter `{name}` has the shape {size:?}, the model's is {wanted:?}"));
    }
    let mut rows = if is_grown { to.narrow(0, 0, size[0]) } else { to.shallow_clone() };
    tch::no_grad(|| rows.copy_(from));
    Ok(())
}

/// Numbers that travel with the gradients: the summed loss, the number of targets, and how many ranks were asked to stop
/// and to save.
const TAIL: i64 = 4;

impl Parameters {
    /// Lays the given tensors out one after the other, with zeros in between.
    pub fn new(initial: Initial, device: Device) -> Self {
        let Initial { values: initial, n_shares, .. } = initial;
        let mut views: Vec<View> = Vec::with_capacity(initial.len());
        for (name, tensor) in &initial {
            let (start, n) = (views.last().map_or(0, View::end), tensor.numel() as i64);
            views.push(View { name: name.clone(), shape: tensor.size(), range: start..start + n });
        }
        let end = views.last().map_or(0, View::end);
        let values = Tensor::zeros([end], (Kind::Float, device));
        for (view, (_, tensor)) in views.iter().zip(&initial) {
            view.of(&values).copy_(tensor);
        }
        // A large table would lie beside its copy for good.
        drop(initial);
        return_freed_memory();
        let gradients = Tensor::zeros([end + TAIL], (Kind::Float, device));
        let leaves = views.iter().map(|view| view.of(&values).detach().set_requires_grad(true)).collect();
        let n_own = n_shares.checked_sub(1).map_or(0, |last| views[last].end());
        Self { views: views.into(), values, gradients, leaves, n_own }
    }

    /// The parameters, in order.
    pub fn views(&self) -> &[View] {
        &self.views
    }

    /// The same parameters, for another thread.
    pub fn handle(&self) -> Self {
        Self {
            views: Arc::clone(&self.views),
            values: self.values.shallow_clone(),
            gradients: self.gradients.shallow_clone(),
            leaves: self.leaves.iter().map(Tensor::shallow_clone).collect(),
            n_own: self.n_own,
        }
    }

    /// Number of values, with those in between.
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

    /// What the ranks sum after a backward pass: the gradients of what all have, and the tail.
    pub fn reduced(&self) -> Tensor {
        self.gradients.narrow(0, self.n_own, self.gradients.size()[0] - self.n_own)
    }

    /// The gradients of parameter number `first` and all behind it, with what travels with them.
    pub(super) fn gradients_from(&self, first: usize) -> Tensor {
        let start = self.views[first].range.start;
        self.gradients.narrow(0, start, self.gradients.size()[0] - start)
    }

    /// The gradients of parameters that lie side by side.
    pub(super) fn gradients_of(&self, parameters: Range<usize>) -> Tensor {
        let start = self.views[parameters.start].range.start;
        self.gradients.narrow(0, start, self.views[parameters.end - 1].end() - start)
    }

    /// The gradients that a rank alone has, complete without the others: flat.
    pub fn own_gradients(&self) -> Tensor {
        self.gradients.narrow(0, 0, self.n_own)
    }

    /// Numbers of the parameters that a rank alone has.
    pub fn own(&self) -> Range<usize> {
        0..self.views.iter().take_while(|view| view.range.end <= self.n_own).count()
    }

    /// What all ranks have, flat.
    pub fn common_values(&self) -> Tensor {
        self.values.narrow(0, self.n_own, self.len() - self.n_own)
    }

    /// `[loss, n_targets, n_stop, n_save]`: `[4]`.
    pub fn tail(&self) -> Tensor {
        self.gradients.narrow(0, self.len(), TAIL)
    }

    /// The parameter number `index` as a leaf of the autograd graph.
    pub fn leaf(&self, index: usize) -> &Tensor {
        &self.leaves[index]
    }

    /// Keeps a parameter as a constant of type `kind` from now on, in memory of its own: a view of the flat buffer would be
    /// saved with the whole of it.
    pub(super) fn freeze(&mut self, index: usize, kind: Kind) {
        self.leaves[index] = self.leaves[index].detach().to_dtype(kind, false, true);
    }

    /// The gradient of parameter number `index`, shaped like it.
    pub fn gradient(&self, index: usize) -> Tensor {
        self.views[index].of(&self.gradients)
    }

    /// Forgets the gradients of the last step.
    pub fn zero_gradients(&mut self) {
        let _ = self.gradients.zero_();
    }

    /// Splits a flat tensor as long as [`Parameters::values`] into named tensors.
    pub fn named(&self, flat: &Tensor) -> Vec<(String, Tensor)> {
        self.named_from(flat, 0)
    }

    /// Splits a flat tensor that begins where number `first` of all values lies.
    pub fn named_from(&self, flat: &Tensor, first: i64) -> Vec<(String, Tensor)> {
        let covered = first..first + flat.size()[0];
        let inside = |view: &&View| covered.start <= view.range.start && view.range.end <= covered.end;
        let named = |view: &View| {
            let n = view.range.end - view.range.start;
            (view.name.clone(), flat.narrow(0, view.range.start - first, n).view(view.shape.as_slice()))
        };
        self.views.iter().filter(inside).map(named).collect()
    }

    /// Copies named tensors into a flat tensor as long as [`Parameters::values`]. Those of `growing` may have fewer rows; what
    /// is behind these stays.
    ///
    /// # Errors
    /// Names the first parameter that is missing, unknown or of another shape.
    pub fn assign(&self, flat: &Tensor, named: &[(String, Tensor)], growing: &[View]) -> Result<(), String> {
        self.check_names(named.iter().map(|(name, _)| name.as_str()))?;
        named.iter().try_for_each(|(name, tensor)| self.assign_one(flat, (name, tensor), growing))
    }

    /// The same for one of them.
    ///
    /// # Errors
    /// It is unknown or of another shape.
    pub fn assign_one(
        &self,
        flat: &Tensor,
        (name, tensor): (&str, &Tensor),
        growing: &[View],
    ) -> Result<(), String> {
        let view = self.views.iter().find(|view| view.name == name);
        let view = view.ok_or_else(|| format!("unknown parameter `{name}`"))?;
        copy_rows(name, tensor, &view.of(flat), growing.contains(view))
    }

    /// Whether these are the names of all parameters.
    ///
    /// # Errors
    /// Names the first that is unknown or missing.
    pub fn check_names<'a>(&self, names: impl Iterator<Item = &'a str> + Clone) -> Result<(), String> {
        if let Some(name) = names.clone().find(|name| self.views.iter().all(|view| view.name != *name)) {
            return Err(format!("unknown parameter `{name}`"));
        }
        match self.views.iter().find(|view| names.clone().all(|name| view.name != name)) {
            Some(view) => Err(format!("parameter `{}` is missing", view.name)),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_takes_fewer_rows_where_it_may_have_grown() {
        let saved =
            |rows: i64| vec![("table".to_owned(), Tensor::full([rows, 2], 5.0, (Kind::Float, Device::Cpu)))];
        let mut initial = Initial::default();
        initial.constant("table", &[3, 2], 1.0);
        let parameters = Parameters::new(initial, Device::Cpu);
        let values = parameters.values();
        let growing = parameters.views();
        let refused = parameters.assign(&values, &saved(2), &[]).unwrap_err();
        assert_eq!(refused, "parameter `table` has the shape [2, 2], the model's is [3, 2]");
        assert!(parameters.assign(&values, &saved(4), growing).is_err());
        parameters.assign(&values, &saved(2), growing).unwrap();
        let table = &parameters.named(&values)[0].1;
        assert_eq!(Vec::<f32>::try_from(table.reshape([-1])).unwrap(), [5.0, 5.0, 5.0, 5.0, 1.0, 1.0]);
        parameters.assign(&values, &saved(3), &[]).unwrap();
        assert_eq!(table.sum(Kind::Float).double_value(&[]), 30.0);
    }
}
