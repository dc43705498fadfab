//! Named tensors as the KServe v2 protocol carries them: row-major and little endian; each text is
//! preceded by its length.

use crate::data_type::DataType;

/// A borrowed [`Tensor`].
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    pub name: &'a str,
    pub datatype: DataType,
    pub shape: &'a [i64],
    pub data: &'a [u8],
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    pub name: String,
    pub datatype: DataType,
    /// Sizes, the outermost first.
    pub shape: Vec<i64>,
    /// The elements, one after the other.
    pub data: Vec<u8>,
}

impl Tensor {
    /// An INT64 tensor.
    pub fn ints(name: &str, shape: &[i64], values: impl IntoIterator<Item = i64>) -> Self {
        let data = values.into_iter().flat_map(i64::to_le_bytes).collect();
        Self { name: name.to_owned(), datatype: DataType::Int64, shape: shape.to_vec(), data }
    }

    /// An FP32 tensor.
    pub fn floats(name: &str, shape: &[i64], values: impl IntoIterator<Item = f32>) -> Self {
        let data = values.into_iter().flat_map(f32::to_le_bytes).collect();
        Self { name: name.to_owned(), datatype: DataType::Fp32, shape: shape.to_vec(), data }
    }

    /// A BYTES tensor.
    pub fn texts<'t>(name: &str, shape: &[i64], texts: impl IntoIterator<Item = &'t str>) -> Self {
        let mut data = Vec::new();
        for text in texts {
            data.extend((text.len() as u32).to_le_bytes());
            data.extend(text.as_bytes());
        }
        Self { name: name.to_owned(), datatype: DataType::Bytes, shape: shape.to_vec(), data }
    }

    pub fn view(&self) -> TensorView<'_> {
        let Self { name, datatype, shape, data } = self;
        TensorView { name, datatype: *datatype, shape, data }
    }
}

impl<'a> TensorView<'a> {
    /// The number of elements by the shape.
    ///
    /// # Errors
    /// A negative size, or a product that overflows.
    pub fn n_elements(&self) -> Result<usize, String> {
        let Self { name, shape, .. } = self;
        if let Some(number) = shape.iter().position(|&size| size < 0) {
            return Err(format!(
                "input `{name}` has the shape {shape:?}: dimension {number} is negative"
            ));
        }
        let product =
            shape.iter().try_fold(1usize, |product, &size| product.checked_mul(size as usize));
        product.ok_or_else(|| {
            format!("input `{name}` has the shape {shape:?}: too many elements to count")
        })
    }

    /// Checks that the data holds as many elements as the shape requires.
    ///
    /// # Errors
    /// Too few or too many bytes, or lengths of texts that do not add up.
    pub fn check(&self) -> Result<(), String> {
        let n = self.n_elements()?;
        let Some(size) = self.datatype.size() else { return self.split_texts().map(drop) };
        if Some(self.data.len()) == n.checked_mul(size) {
            return Ok(());
        }
        let Self { name, datatype, shape, data } = self;
        let holds = if data.len() % size == 0 {
            format!("{} elements", data.len() / size)
        } else {
            format!("{} bytes", data.len())
        };
        Err(format!(
            "input `{name}` of shape {shape:?} must hold {n} elements of {datatype}, not {holds}"
        ))
    }

    fn check_type(&self, datatype: DataType) -> Result<(), String> {
        if self.datatype == datatype {
            return Ok(());
        }
        Err(format!("input `{}` must be of type {datatype}, not {}", self.name, self.datatype))
    }

    /// The elements of a tensor that must be of the type `datatype`, of `N` bytes each.
    fn numbers<T, const N: usize>(
        &self,
        datatype: DataType,
        from_bytes: fn([u8; N]) -> T,
    ) -> Result<Vec<T>, String> {
        self.check_type(datatype)?;
        self.check()?;
        let (elements, _) = self.data.as_chunks();
        Ok(elements.iter().map(|&bytes| from_bytes(bytes)).collect())
    }

    /// The elements of an INT64 tensor.
    ///
    /// # Errors
    /// Another type, or data that [`TensorView::check`] refuses.
    pub fn i64s(&self) -> Result<Vec<i64>, String> {
        self.numbers(DataType::Int64, i64::from_le_bytes)
    }

    /// The elements of an INT32 tensor. Errors as [`TensorView::i64s`].
    pub fn i32s(&self) -> Result<Vec<i32>, String> {
        self.numbers(DataType::Int32, i32::from_le_bytes)
    }

    /// The elements of an FP64 tensor. Errors as [`TensorView::i64s`].
    pub fn f64s(&self) -> Result<Vec<f64>, String> {
        self.numbers(DataType::Fp64, f64::from_le_bytes)
    }

    /// The elements of an FP32 tensor. Errors as [`TensorView::i64s`].
    pub fn f32s(&self) -> Result<Vec<f32>, String> {
        self.numbers(DataType::Fp32, f32::from_le_bytes)
    }

    /// The elements of a BOOL tensor. Errors as [`TensorView::i64s`].
    pub fn bools(&self) -> Result<Vec<bool>, String> {
        self.numbers(DataType::Bool, |[byte]| byte != 0)
    }

    /// The elements of a BYTES tensor.
    ///
    /// # Errors
    /// Another type, lengths that do not add up, or bytes that are not UTF-8.
    pub fn texts(&self) -> Result<Vec<&'a str>, String> {
        self.check_type(DataType::Bytes)?;
        let text = |(number, bytes)| {
            std::str::from_utf8(bytes)
                .map_err(|_| format!("input `{}`, element {number}: not UTF-8", self.name))
        };
        self.split_texts()?.into_iter().enumerate().map(text).collect()
    }

    fn split_texts(&self) -> Result<Vec<&'a [u8]>, String> {
        let n = self.n_elements()?;
        // Every text takes at least the 4 bytes of its length: a shape without data allocates
        // nothing.
        let mut texts = Vec::with_capacity(n.min(self.data.len() / 4));
        let mut rest = self.data;
        let take = |rest: &mut &'a [u8], n: usize| {
            rest.split_at_checked(n).map(|(taken, after)| {
                *rest = after;
                taken
            })
        };
        for number in 0..n {
            let text = take(&mut rest, 4).and_then(|length| {
                let length = u32::from_le_bytes(length.try_into().expect("4 bytes"));
                take(&mut rest, length as usize)
            });
            texts.push(text.ok_or_else(|| {
                format!(
                    "input `{}`, element {number}: its length goes past the end of the data",
                    self.name
                )
            })?);
        }
        if !rest.is_empty() {
            return Err(format!(
                "input `{}` has {} bytes after its {n} elements",
                self.name,
                rest.len()
            ));
        }
        Ok(texts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_come_back() {
        let tensor = Tensor::texts("t", &[3, 1], ["", "é", "abc"]);
        assert_eq!(tensor.view().texts().unwrap(), ["", "é", "abc"]);
    }

    #[test]
    fn wrong_lengths_are_refused() {
        let good = Tensor::texts("t", &[2], ["ab", "c"]);
        let cases: [(&[i64], Vec<u8>, &str); 6] = [
            (&[2], good.data[..10].to_vec(), "element 1: its length goes past the end"),
            (&[3], good.data.clone(), "element 2: its length goes past the end"),
            (&[1], good.data.clone(), "5 bytes after its 1 elements"),
            (&[1], vec![0xff, 0xff, 0xff, 0xff, 0], "element 0: its length goes past the end"),
            (&[-1], good.data.clone(), "has the shape [-1]: dimension 0 is negative"),
            (&[i64::MAX, 4], good.data.clone(), "too many elements"),
        ];
        for (shape, data, message) in cases {
            let tensor = Tensor { shape: shape.to_vec(), data, ..good.clone() };
            let error = tensor.view().texts().unwrap_err();
            assert!(error.contains(message), "{error}");
        }
        let short = Tensor { data: vec![0; 15], ..Tensor::ints("n", &[2], [1, 2]) };
        assert!(
            short
                .view()
                .i64s()
                .unwrap_err()
                .contains("must hold 2 elements of INT64, not 15 bytes")
        );
        assert!(short.view().f64s().unwrap_err().contains("must be of type FP64, not INT64"));
        let latin = Tensor { data: vec![1, 0, 0, 0, 0xe9], shape: vec![1], ..good };
        assert!(latin.view().texts().unwrap_err().contains("not UTF-8"));
    }
}
