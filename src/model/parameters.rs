//! The parameters of a model in one flat buffer, and their gradients in another.
//!
//! One buffer makes the all-reduce one call, the optimizer a handful of kernels, and the global
//! norm one reduction, whatever the number of tensors. Sharded item tables come first: everything
//! behind them is replicated, and only that is reduced.

use std::ops::Range;
use std::sync::Arc;

use tch::{Device, Kind, Tensor};

use super::ItemTable;
use super::rows::joined;
use crate::device::memory::return_freed_memory;

/// Declares parameters and draws their initial values. A parameter is known by its index, the order
/// of declaration.
#[derive(Default)]
pub struct ParameterBuilder {
    values: Vec<(String, Tensor)>,
    /// Number of sharded tables, which are declared first.
    n_sharded: usize,
    /// Names and shapes instead of values, for [`ParameterBuilder::sizes_only`].
    sizes: Option<Vec<(String, Vec<i64>)>>,
}

/// Rows of a table that are drawn at once. libtorch's generator gives the same numbers for one draw
/// and for several, as long as each but the last is a multiple of 16 numbers.
const BLOCK_ROWS: i64 = 1 << 16;

impl ParameterBuilder {
    /// Records names and shapes only, without memory for values.
    pub(super) fn sizes_only() -> Self {
        Self { sizes: Some(Vec::new()), ..Self::default() }
    }

    /// The recorded names and shapes.
    pub(super) fn into_sizes(self) -> Vec<(String, Vec<i64>)> {
        self.sizes.unwrap_or_default()
    }

    pub fn len(&self) -> usize {
        self.sizes.as_ref().map_or(self.values.len(), Vec::len)
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The local rows of an item table `[V, width]`, normal with mean 0. A row has the same values
    /// whichever rank holds it. Item tables come before all other parameters.
    pub fn item_table(
        &mut self,
        name: impl Into<String>,
        width: i64,
        std: f64,
        table: &ItemTable<'_>,
    ) -> usize {
        self.add_item_table(name.into(), &[table.len(), width], table, || {
            let rows = Tensor::empty([table.len(), width], (Kind::Float, Device::Cpu));
            let mut start = 0;
            while start < table.n_items {
                // libtorch draws fewer than 16 numbers by another algorithm, so the last block is
                // joined with the one before it.
                let left = table.n_items - start;
                let n = if left < 2 * BLOCK_ROWS { left } else { BLOCK_ROWS };
                let block = Tensor::randn([n, width], (Kind::Float, Device::Cpu)) * std;
                let local = start.max(table.rows.start)..(start + n).min(table.rows.end);
                if !local.is_empty() {
                    let n_local = local.end - local.start;
                    let mut to = rows.narrow(0, local.start - table.rows.start, n_local);
                    to.copy_(&block.narrow(0, local.start - start, n_local));
                }
                start += n;
            }
            rows
        })
    }

    /// One number `value` for each local item.
    pub fn item_bias(
        &mut self,
        name: impl Into<String>,
        value: f64,
        table: &ItemTable<'_>,
    ) -> usize {
        let full = || Tensor::full([table.len()], value, (Kind::Float, Device::Cpu));
        self.add_item_table(name.into(), &[table.len()], table, full)
    }

    fn add_item_table(
        &mut self,
        name: String,
        size: &[i64],
        table: &ItemTable<'_>,
        draw: impl FnOnce() -> Tensor,
    ) -> usize {
        let index = self.add(name, size, draw);
        if table.is_sharded() {
            debug_assert_eq!(index, self.n_sharded, "sharded tables are declared first");
            self.n_sharded = index + 1;
        }
        index
    }

    /// Normal with mean 0.
    pub fn normal(&mut self, name: impl Into<String>, size: &[i64], std: f64) -> usize {
        self.add(name.into(), size, || Tensor::randn(size, (Kind::Float, Device::Cpu)) * std)
    }

    /// Vectors of `width`, normal with mean 0, and biases of 0, side by side: `[n, width + 1]`.
    pub fn vectors_and_bias(
        &mut self,
        name: impl Into<String>,
        n: i64,
        width: i64,
        std: f64,
    ) -> usize {
        let of_vectors = || Tensor::randn([n, width], (Kind::Float, Device::Cpu)) * std;
        self.add(name.into(), &[n, width + 1], || of_vectors().constant_pad_nd([0, 1]))
    }

    /// Uniform in ±1/√fan_in, PyTorch's default for linear and recurrent layers.
    pub fn uniform(&mut self, name: impl Into<String>, size: &[i64], fan_in: i64) -> usize {
        let bound = (fan_in as f64).powf(-0.5);
        let draw = || Tensor::empty(size, (Kind::Float, Device::Cpu)).uniform_(-bound, bound);
        self.add(name.into(), size, draw)
    }

    pub fn constant(&mut self, name: impl Into<String>, size: &[i64], value: f64) -> usize {
        self.add(name.into(), size, || Tensor::full(size, value, (Kind::Float, Device::Cpu)))
    }

    /// A linear layer with PyTorch's default initialisation.
    pub fn linear(&mut self, name: &str, n_in: i64, n_out: i64) -> Linear {
        let weight = self.uniform(format!("{name}.weight"), &[n_out, n_in], n_in);
        Linear { weight, bias: self.uniform(format!("{name}.bias"), &[n_out], n_in) }
    }

    /// A linear layer with normal weights and a zero bias.
    pub fn normal_linear(&mut self, name: &str, n_in: i64, n_out: i64, std: f64) -> Linear {
        let weight = self.normal(format!("{name}.weight"), &[n_out, n_in], std);
        Linear { weight, bias: self.constant(format!("{name}.bias"), &[n_out], 0.0) }
    }

    /// A layer norm with unit weight and zero bias.
    pub fn layer_norm(&mut self, name: &str, width: i64, epsilon: f64) -> LayerNorm {
        let weight = self.constant(format!("{name}.weight"), &[width], 1.0);
        LayerNorm {
            weight,
            bias: self.constant(format!("{name}.bias"), &[width], 0.0),
            width,
            epsilon,
        }
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

/// Position and shape of a parameter in the flat buffers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    /// Name, as in checkpoints.
    pub name: String,
    /// Shape, row-major.
    pub shape: Vec<i64>,
    range: Range<i64>,
}

/// Parameters begin at multiples of this many numbers: one cache line, more than the alignment that
/// matrix products need.
const ALIGNED: i64 = 16;

impl View {
    /// Where in the flat buffers the next parameter may begin.
    pub fn end(&self) -> i64 {
        let Range { end, .. } = self.range;
        end + (ALIGNED - end % ALIGNED) % ALIGNED
    }

    /// Its part of a flat buffer of all parameters, shaped like it.
    pub fn of(&self, flat: &Tensor) -> Tensor {
        flat.narrow(0, self.range.start, self.range.end - self.range.start)
            .view(self.shape.as_slice())
    }
}

/// Named parameters in a flat buffer, in the order of declaration.
pub struct Parameters {
    views: Arc<[View]>,
    values: Tensor,
    /// One autograd leaf for each view, sharing memory with `values`.
    leaves: Vec<Tensor>,
    n_sharded: i64,
}

/// Copies `from` into `to`, which must be as large, or may have more rows if it `may_grow`.
///
/// # Errors
/// Says what `name` is and should be.
pub fn copy_rows(name: &str, from: &Tensor, to: &Tensor, may_grow: bool) -> Result<(), String> {
    let (size, wanted) = (from.size(), to.size());
    let is_grown =
        may_grow && size.len() == wanted.len() && size[1..] == wanted[1..] && size[0] < wanted[0];
    if size != wanted && !is_grown {
        return Err(format!(
            "parameter `{name}` has the shape {size:?}, the model's is {wanted:?}"
        ));
    }
    let mut rows = if is_grown { to.narrow(0, 0, size[0]) } else { to.shallow_clone() };
    tch::no_grad(|| rows.copy_(from));
    Ok(())
}

impl Parameters {
    /// Lays the declared tensors out one after the other, each at an aligned offset.
    pub fn new(declared: ParameterBuilder, device: Device) -> Self {
        let ParameterBuilder { values: declared, n_sharded, .. } = declared;
        let mut views: Vec<View> = Vec::with_capacity(declared.len());
        for (name, tensor) in &declared {
            let (start, n) = (views.last().map_or(0, View::end), tensor.numel() as i64);
            views.push(View { name: name.clone(), shape: tensor.size(), range: start..start + n });
        }
        let end = views.last().map_or(0, View::end);
        let values = Tensor::zeros([end], (Kind::Float, device));
        for (view, (_, tensor)) in views.iter().zip(&declared) {
            view.of(&values).copy_(tensor);
        }
        // The drawn tensors are as large as the model; free them before the gradients are
        // allocated.
        drop(declared);
        return_freed_memory();
        let leaves =
            views.iter().map(|view| view.of(&values).detach().set_requires_grad(true)).collect();
        let n_sharded = n_sharded.checked_sub(1).map_or(0, |last| views[last].end());
        Self { views: views.into(), values, leaves, n_sharded }
    }

    /// Zero gradients for these parameters.
    pub fn zero_gradients(&self) -> Gradients {
        let flat = Tensor::zeros([self.len() + SCALARS], (Kind::Float, self.values.device()));
        let (views, n_sharded) = (Arc::clone(&self.views), self.n_sharded);
        Gradients { views, flat, n_sharded, row_lists: Vec::new() }
    }

    pub fn views(&self) -> &[View] {
        &self.views
    }

    /// The same parameters for another thread; values are shared.
    pub fn share(&self) -> Self {
        Self {
            views: Arc::clone(&self.views),
            values: self.values.shallow_clone(),
            leaves: self.leaves.iter().map(Tensor::shallow_clone).collect(),
            n_sharded: self.n_sharded,
        }
    }

    /// Number of values, alignment gaps included.
    pub fn len(&self) -> i64 {
        self.values.size()[0]
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All values, `[n]`.
    pub fn values(&self) -> Tensor {
        self.values.shallow_clone()
    }

    /// Values that every rank holds, `[n]`.
    pub fn replicated_values(&self) -> Tensor {
        self.values.narrow(0, self.n_sharded, self.len() - self.n_sharded)
    }

    /// Parameter number `index` as a leaf of the autograd graph.
    pub fn leaf(&self, index: usize) -> &Tensor {
        &self.leaves[index]
    }

    /// Converts a parameter to a constant of type `kind` with separate memory: a view would be
    /// saved together with the whole flat buffer.
    pub(super) fn freeze(&mut self, index: usize, kind: Kind) {
        self.leaves[index] = self.leaves[index].detach().to_dtype(kind, false, true);
    }

    /// Gives a parameter the values `by`, in memory of its own.
    pub(super) fn replace(&mut self, index: usize, by: &Tensor) {
        self.leaves[index] = by.detach();
    }

    /// Splits a flat tensor as long as [`Parameters::values`] into named tensors.
    pub fn named(&self, flat: &Tensor) -> Vec<(String, Tensor)> {
        self.named_from(flat, 0)
    }

    /// Splits a flat tensor whose first element belongs at offset `first` of all values.
    pub fn named_from(&self, flat: &Tensor, first: i64) -> Vec<(String, Tensor)> {
        let covered = first..first + flat.size()[0];
        let inside =
            |view: &&View| covered.start <= view.range.start && view.range.end <= covered.end;
        let named = |view: &View| {
            let n = view.range.end - view.range.start;
            (
                view.name.clone(),
                flat.narrow(0, view.range.start - first, n).view(view.shape.as_slice()),
            )
        };
        self.views.iter().filter(inside).map(named).collect()
    }

    /// Copies named tensors into a flat tensor as long as [`Parameters::values`]. Parameters in
    /// `growing` may have fewer rows in `named`; their other rows keep their values.
    ///
    /// # Errors
    /// Names the first parameter that is missing, unknown or of another shape.
    pub fn assign(
        &self,
        flat: &Tensor,
        named: &[(String, Tensor)],
        growing: &[View],
    ) -> Result<(), String> {
        self.check_names(named.iter().map(|(name, _)| name.as_str()))?;
        named.iter().try_for_each(|(name, tensor)| self.assign_one(flat, name, tensor, growing))
    }

    /// [`Parameters::assign`] for one tensor.
    ///
    /// # Errors
    /// The parameter is unknown or of another shape.
    pub fn assign_one(
        &self,
        flat: &Tensor,
        name: &str,
        tensor: &Tensor,
        growing: &[View],
    ) -> Result<(), String> {
        let view = self.views.iter().find(|view| view.name == name);
        let view = view.ok_or_else(|| format!("unknown parameter `{name}`"))?;
        copy_rows(name, tensor, &view.of(flat), growing.contains(view))
    }

    /// Checks that `names` are the names of all parameters.
    ///
    /// # Errors
    /// Names the first parameter that is unknown or missing.
    pub fn check_names<'a>(
        &self,
        names: impl Iterator<Item = &'a str> + Clone,
    ) -> Result<(), String> {
        if let Some(name) =
            names.clone().find(|name| self.views.iter().all(|view| view.name != *name))
        {
            return Err(format!("unknown parameter `{name}`"));
        }
        match self.views.iter().find(|view| names.clone().all(|name| view.name != name)) {
            Some(view) => Err(format!("parameter `{}` is missing", view.name)),
            None => Ok(()),
        }
    }
}

/// Number of step scalars that are reduced together with the gradients.
const SCALARS: i64 = 4;

/// The gradients of [`Parameters`] in a flat buffer, followed by the scalars of a step, so that one
/// call reduces both.
pub struct Gradients {
    views: Arc<[View]>,
    /// `[n + SCALARS]`.
    flat: Tensor,
    n_sharded: i64,
    /// Gradients of the first parameters, the tables, by row; empty if they are in `flat`.
    row_lists: Vec<RowList>,
}

/// Gradients of rows of a table, of which few change in a step.
#[derive(Default)]
pub struct RowList {
    /// i64 `[n]` each; rows may repeat, and row 0 is not learnt.
    rows: Vec<Tensor>,
    /// f32 `[n, ..]` each.
    gradients: Vec<Tensor>,
}

impl RowList {
    /// Adds gradients `[n, ..]` of rows `[n]`.
    pub fn add(&mut self, rows: &Tensor, gradients: &Tensor) {
        self.rows.push(rows.shallow_clone());
        self.gradients.push(gradients.shallow_clone());
    }

    /// All rows and gradients, `[N]` and `[N, ..]`; `None` without any.
    pub fn joined(self) -> Option<(Tensor, Tensor)> {
        (!self.rows.is_empty()).then(|| (joined(self.rows), joined(self.gradients)))
    }
}

impl Gradients {
    /// Lists the gradients of the first `n_tables` parameters by row, instead of adding them to
    /// [`Gradients::all`].
    pub fn list_rows(&mut self, n_tables: usize) {
        self.row_lists = (0..n_tables).map(|_| RowList::default()).collect();
    }

    /// Number of tables whose gradients are listed by row.
    pub fn n_listed(&self) -> usize {
        self.row_lists.len()
    }

    /// The list of parameter number `index`, if it has one.
    pub fn list_of(&mut self, index: usize) -> Option<&mut RowList> {
        self.row_lists.get_mut(index)
    }

    /// Takes the lists, in the order of the tables, and leaves empty ones.
    pub fn take_lists(&mut self) -> Vec<RowList> {
        let n_tables = self.row_lists.len();
        let lists = std::mem::take(&mut self.row_lists);
        self.list_rows(n_tables);
        lists
    }

    /// The gradients that are not listed, and not sharded: `[n]`.
    pub fn dense(&self) -> Tensor {
        let start = match self.row_lists.len().checked_sub(1) {
            Some(last) => self.views[last].end(),
            None => self.n_sharded,
        };
        self.flat.narrow(0, start, self.flat.size()[0] - SCALARS - start)
    }

    /// All gradients, `[n]`.
    pub fn all(&self) -> Tensor {
        self.flat.narrow(0, 0, self.flat.size()[0] - SCALARS)
    }

    /// The gradient of parameter number `index`, shaped like it.
    pub fn of(&self, index: usize) -> Tensor {
        self.views[index].of(&self.flat)
    }

    /// Gradients of parameters that are adjacent in the buffer: `[n]`.
    pub fn of_range(&self, parameters: Range<usize>) -> Tensor {
        let start = self.views[parameters.start].range.start;
        self.flat.narrow(0, start, self.views[parameters.end - 1].end() - start)
    }

    /// Gradients of the parameters from number `first` on, and the scalars: `[n]`.
    pub fn from(&self, first: usize) -> Tensor {
        let start = self.views[first].range.start;
        self.flat.narrow(0, start, self.flat.size()[0] - start)
    }

    /// Gradients of the sharded tables, which only this rank holds: `[n]`.
    pub fn sharded(&self) -> Tensor {
        self.flat.narrow(0, 0, self.n_sharded)
    }

    /// Numbers of the parameters that are sharded.
    pub fn sharded_parameters(&self) -> Range<usize> {
        0..self.views.iter().take_while(|view| view.range.end <= self.n_sharded).count()
    }

    /// Gradients of the parameters that every rank holds: `[n]`.
    pub fn replicated(&self) -> Tensor {
        self.flat.narrow(0, self.n_sharded, self.flat.size()[0] - SCALARS - self.n_sharded)
    }

    /// [`Gradients::replicated`] and the scalars: `[n]`.
    pub fn replicated_and_scalars(&self) -> Tensor {
        self.flat.narrow(0, self.n_sharded, self.flat.size()[0] - self.n_sharded)
    }

    /// The scalars of a step: `[4]`.
    pub fn scalars(&self) -> Tensor {
        self.flat.narrow(0, self.flat.size()[0] - SCALARS, SCALARS)
    }

    /// Sets gradients and scalars to zero.
    pub fn zero(&mut self) {
        let _ = self.flat.zero_();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_takes_fewer_rows_where_it_may_have_grown() {
        let saved = |rows: i64| {
            vec![("table".to_owned(), Tensor::full([rows, 2], 5.0, (Kind::Float, Device::Cpu)))]
        };
        let mut builder = ParameterBuilder::default();
        builder.constant("table", &[3, 2], 1.0);
        let parameters = Parameters::new(builder, Device::Cpu);
        let values = parameters.values();
        let growing = parameters.views();
        let refused = parameters.assign(&values, &saved(2), &[]).unwrap_err();
        assert_eq!(refused, "parameter `table` has the shape [2, 2], the model's is [3, 2]");
        assert!(parameters.assign(&values, &saved(4), growing).is_err());
        parameters.assign(&values, &saved(2), growing).unwrap();
        let table = &parameters.named(&values)[0].1;
        assert_eq!(
            Vec::<f32>::try_from(table.reshape([-1])).unwrap(),
            [5.0, 5.0, 5.0, 5.0, 1.0, 1.0]
        );
        parameters.assign(&values, &saved(3), &[]).unwrap();
        assert_eq!(table.sum(Kind::Float).double_value(&[]), 30.0);
    }
}
